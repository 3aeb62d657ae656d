"""Codes to bytes and back: every format unpacks to exactly the codes that went in.

Imports only `numeric` and the errors. `native` is the project's own format, specified byte by byte in
`docs/formats/native.md`.
"""
