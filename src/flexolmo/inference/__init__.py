"""Running a mixture: the choice of experts, and the text that they write."""
