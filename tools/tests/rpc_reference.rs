//! docs/rpc.md names every method and parameter that there is, and none that there is not.

use std::collections::BTreeSet;

use ringmill_tools::rpc::methods::METHODS;

#[test]
fn the_reference_and_the_table_of_methods_agree() {
    let page = include_str!("../../docs/rpc.md");
    let mut described = BTreeSet::new();
    for section in page.split("\n### `").skip(1) {
        let (name, text) = section.split_once('`').unwrap_or_default();
        let Some(method) = METHODS.iter().find(|method| method.name == name) else {
            panic!("docs/rpc.md describes {name}, which is not a method");
        };
        for param in method.params {
            assert!(text.contains(&format!("`{}`", param.name)), "{name}: {}", param.name);
        }
        let rows = text.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
        for row in rows {
            assert!(method.params.iter().any(|param| param.name == row), "{name} has no {row}");
        }
        described.insert(name);
    }
    let all: BTreeSet<&str> = METHODS.iter().map(|method| method.name).collect();
    assert_eq!(described, all);
}
