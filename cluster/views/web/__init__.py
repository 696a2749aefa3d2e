"""`align inspect RUN --web`: the run folder as local pages, read as it is at each request."""
