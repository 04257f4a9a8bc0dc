"""Drawn people with exact labels, the data of the demo and the tests. The paper has no such thing; it is ours."""
