//! Dependency direction: `core ← drivers`, `core ← vmm-glue`, all `← tools, benches`.
//!
//! Reads each `Cargo.toml` line by line; dev-dependencies are free, except that nothing below may need what is above.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::Finding;

/// A package's folder and the packages of ours that it may depend on.
const ALLOWED: [(&str, &[&str]); 3] =
    [("core", &[]), ("drivers", &["ringmill-core"]), ("vmm-glue", &["ringmill-core"])];

const PREFIX: &str = "ringmill-";

pub(super) fn check(root: &Path) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for (folder, allowed) in ALLOWED {
        let path = Path::new(folder).join("Cargo.toml");
        let text = fs::read_to_string(root.join(&path))
            .with_context(|| format!("reading {}", path.display()))?;
        findings.extend(check_manifest(&path, &text, allowed));
    }
    Ok(findings)
}

fn check_manifest(path: &Path, text: &str, allowed: &[&str]) -> Vec<Finding> {
    let mut is_dependencies = false;
    let mut findings = Vec::new();
    for (index, line) in text.lines().map(str::trim).enumerate() {
        let mut key = line;
        if let Some(section) = line.strip_prefix('[') {
            let section = section.trim_end_matches(']');
            // [dependencies], [dependencies.x], [build-dependencies], [target.'…'.dependencies]
            is_dependencies =
                section.contains("dependencies") && !section.contains("dev-dependencies");
            key = section.rsplit('.').next().unwrap_or(section);
        }
        let name = key.split([' ', '.', '=']).next().unwrap_or(key);
        if is_dependencies && name.starts_with(PREFIX) && !allowed.contains(&name) {
            let text = format!(
                "this package must not depend on {name}, move what both need into ringmill-core"
            );
            findings.push(Finding::new(path, index + 1, text));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str, allowed: &[&str]) -> Vec<usize> {
        check_manifest(Path::new("Cargo.toml"), text, allowed)
            .iter()
            .map(|finding| finding.line)
            .collect()
    }

    #[test]
    fn drivers_may_see_core_but_not_vmm_glue() {
        let manifest = "[package]\nname = \"ringmill-drivers\"\n[dependencies]\nringmill-core.workspace = true\n\
                        ringmill-vmm-glue.workspace = true\n";
        assert_eq!(lines(manifest, &["ringmill-core"]), [5]);
        assert_eq!(lines(manifest, &[]), [4, 5]);
    }

    #[test]
    fn dev_dependencies_are_free_and_sections_of_one_dependency_are_seen() {
        let manifest = "[dev-dependencies]\nringmill-drivers.workspace = true\n[dependencies.ringmill-tools]\npath = \"x\"\n\
                        [target.'cfg(unix)'.dependencies]\nringmill-benches = { path = \"y\" }\n";
        assert_eq!(lines(manifest, &[]), [3, 6]);
    }
}
