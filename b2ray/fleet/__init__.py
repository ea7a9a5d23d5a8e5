"""The fleet: Ray sessions, slots, the dispatch of calls and the replacement of lost actors.

To this package an actor is only something that has a policy version and answers calls. It is the
only package that uses more of Ray than `ray.get` on a reference.
"""
