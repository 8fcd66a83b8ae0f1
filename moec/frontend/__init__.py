"""Frontends: what turns a source model into a `moec.module.Module`."""
