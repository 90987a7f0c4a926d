"""Recipes and loops. Every command takes a recipe file, a data folder and an output folder."""
