"""A layer or a step of anybody's, held against the module that it was made from."""
