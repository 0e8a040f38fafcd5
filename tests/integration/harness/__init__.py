"""Runs real servers and real VMs in network namespaces of their own, and sees what they leave behind.

Needs nothing but Python and Debian's tools; only `api` needs grpcio. The benches use it too.

- `world`: a host and an internet, as network namespaces · `internet`: what answers there
- `server`: one clawpot-server · `cli`: the command line · `api`: gRPC · `images`: broken copies of the image store
- `leaks`: everything on this machine that bears a server's name
"""
