"""Where metrics go; none of them may end a run or make it wait."""
