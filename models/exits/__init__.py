"""Exits: how many blocks a row runs, known on the host before launch."""
