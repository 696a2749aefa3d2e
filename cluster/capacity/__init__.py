"""Whether a run fits: what it needs, where its processes find room, and changes that would help."""
