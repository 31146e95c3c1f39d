"""Sweeps: many jobs of one command, on this machine or on a cluster; what each has to do and what came of it."""

from fastar.sweep.resolvers import register

register()
