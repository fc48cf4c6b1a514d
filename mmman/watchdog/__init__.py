"""Heartbeat-based failure detection: every process of a run learns which one failed, and ends."""
