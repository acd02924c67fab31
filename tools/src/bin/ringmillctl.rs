//! ringmillctl
fn main() {}
