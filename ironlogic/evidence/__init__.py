"""Claims measured against controls, with intervals."""
