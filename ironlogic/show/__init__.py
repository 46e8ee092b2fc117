"""Results as figures, tables, pages and widgets."""
