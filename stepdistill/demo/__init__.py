"""The embedded default: a small captioned world drawn by code, so that every recipe runs without a download."""
