"""Everything that paints or asks; nothing below imports it."""
