//! The RPC tool; see `ringmill_tools::ctl`.

use std::process::ExitCode;

fn main() -> ExitCode {
    ringmill_tools::ctl::main()
}
