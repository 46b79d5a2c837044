"""Arithmetic about chips and layouts that needs no torch."""
