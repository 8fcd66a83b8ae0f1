"""The patterns of `canonicalize`, one file per dialect. Other passes may use them too."""
