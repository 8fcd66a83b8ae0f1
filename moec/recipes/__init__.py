"""The recipes that come with moec, one YAML file each; `moec.pipeline.recipes` reads them."""
