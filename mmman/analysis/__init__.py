from mmman.analysis.memory import LiveBytes, LiveParts, peak_live_bytes

__all__ = ['LiveBytes', 'LiveParts', 'peak_live_bytes']
