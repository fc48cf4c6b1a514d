"""Heartbeat-based failure detection: if a process fails, all others report which one it was, and exit."""
