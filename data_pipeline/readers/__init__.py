"""Files of every format, on disk or behind a URL, as documents."""
