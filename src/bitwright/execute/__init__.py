"""Where work runs: local threads now; the interface is one ordered map, so other engines can take its place."""
