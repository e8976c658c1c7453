"""Images and text: from scikit-learn, Python's own prose, a hub id or a folder."""
