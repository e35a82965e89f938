"""Studies: declared experiments, and what runs them, resumes them, and tells what they came to. See docs/studies.md."""
