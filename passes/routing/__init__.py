"""Parts of `set-routing` and of the passes that train routers."""
