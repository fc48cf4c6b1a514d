"""Losses and targets of dense heads, computed for a few images at a time or without waiting for the device."""
