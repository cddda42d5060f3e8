"""From an adapter to weights that other programs load: merge, convert, verify."""
