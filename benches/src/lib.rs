//! What the benchmarks share: a queue worker with a guest of its own ([`rig`]), and the cases whose instructions are
//! counted ([`cases`]). The binary `marks` measures time, beside other servers.

pub mod cases;
pub mod nvme;
pub mod rig;
