"""Sweeps: several runs side by side, compared at the end (`b2ray run --sweep FILE`)."""
