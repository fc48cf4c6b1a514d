from mmman.analysis.memory import LiveBytes, peak_live_bytes

__all__ = ['LiveBytes', 'peak_live_bytes']
