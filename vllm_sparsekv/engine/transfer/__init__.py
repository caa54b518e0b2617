"""Pages beyond the cache they were written in: host memory, files, other engines."""
