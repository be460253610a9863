"""Running a mixture: which experts may speak, and what they say."""
