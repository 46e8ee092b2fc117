"""A vision tower, a projector and a language model in one: spliced, proved, trained, asked."""
