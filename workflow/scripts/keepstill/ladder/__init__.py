"""The ladder: five ways to write this program, the classic one first, and keepstill as the sixth.

A small implementation of its own, apart from the engine, that shares neither interpolation nor
estimation with it. docs/ladder.md says what each rung changes, and what that is worth.
"""
