"""The fleet: Ray sessions, slots, dispatch and replacement.

It knows an actor only as something with a version that does calls, and it is the only room that
touches Ray beyond `ray.get` on a ref.
"""
