//! Against a real kernel: needs root, says so and passes otherwise. Everything happens in namespaces that the test makes:
//! a `host`, in which the server's code runs, an `internet` behind it, and guests behind the slots' taps.

mod crash;
mod forged;
mod isolation;
mod lifecycle;
mod renew;
mod world;
