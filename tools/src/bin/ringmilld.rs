//! ringmilld
fn main() {}
