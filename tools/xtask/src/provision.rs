//! Debian packages for the tests: installed as root, named otherwise.
//!
//! Nothing is ever removed or configured on the machine: apt runs with `--no-remove`, and where the installed QEMU
//! tools come from backports (their system emulator then has to, too) the backports suite is known only to a private
//! copy of apt's sources under `target/`.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::packages;

/// What the machine has after all.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// One line for a person about what is missing.
    pub(crate) missing: Option<String>,
}

/// Looks, installs nothing.
pub(crate) fn look() -> Outcome {
    let missing = packages::missing_anywhere();
    Outcome { missing: (!missing.is_empty()).then(|| packages::describe(&missing)) }
}

/// Installs what is missing if this is root, else only looks.
pub(crate) fn provision(root: &Path) -> Result<Outcome> {
    let names = packages::package_names(&packages::missing_anywhere());
    if names.is_empty() || !is_root() {
        return Ok(look());
    }
    if packages::find("apt-get").is_none() {
        bail!(
            "this is no Debian: apt-get is missing, so install these yourself: {}",
            names.join(" ")
        );
    }
    eprintln!("installing {}", names.join(" "));
    if install(&[], &names).is_err() {
        let options = backports(root)
            .context("apt could not install the packages, and backports cannot be tried")?;
        install(&options, &names)
            .context("neither this release nor its backports has the packages together")?;
    }
    Ok(look())
}

/// By the owner of `/proc/self`, which is the effective user.
pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|about| about.uid() == 0)
}

fn install(options: &[String], names: &[&str]) -> Result<()> {
    apt(options, &["-q", "update"])?;
    let mut args = vec!["-q", "-y", "--no-install-recommends", "--no-remove", "install"];
    args.extend(names);
    apt(options, &args)
}

fn apt(options: &[String], args: &[&str]) -> Result<()> {
    let status = Command::new("apt-get")
        .args(options)
        .args(args)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C")
        .status()
        .context("starting apt-get")?;
    if !status.success() {
        bail!("apt-get {} failed with {status}", args.join(" "));
    }
    Ok(())
}

/// Options that make apt see the backports suite as well, and prefer it.
fn backports(root: &Path) -> Result<Vec<String>> {
    let os_release = fs::read_to_string("/etc/os-release").context("reading /etc/os-release")?;
    let codename = os_release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .context("/etc/os-release names no release")?
        .trim_matches('"')
        .to_owned();
    let dir = root.join("target/xtask-apt");
    let (parts, lists) = (dir.join("sources"), dir.join("lists"));
    let _ = fs::remove_dir_all(&dir);
    for made in [&parts, &lists.join("partial")] {
        fs::create_dir_all(made).with_context(|| format!("creating {}", made.display()))?;
    }
    let mut entry = None;
    for path in sources()? {
        let text =
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let name = path.file_name().context("a source without a name")?;
        entry = entry
            .or_else(|| Some((backports_entry(&text, &codename)?, path.extension()?.to_owned())));
        fs::write(parts.join(name), &text).context("copying apt's sources")?;
    }
    let (text, extension) = entry.with_context(|| format!("apt has no source of {codename}"))?;
    let added = parts.join("ringmill-backports").with_extension(extension);
    fs::write(&added, text).with_context(|| format!("writing {}", added.display()))?;
    let option = |name: &str, value: String| ["-o".to_owned(), format!("{name}={value}")];
    let mut options = Vec::new();
    options.extend(option("Dir::Etc::SourceParts", parts.display().to_string()));
    options.extend(option("Dir::Etc::SourceList", "/dev/null".to_owned()));
    options.extend(option("Dir::State::Lists", lists.display().to_string()));
    // apt would else fetch as its own user, who cannot write here.
    options.extend(option("APT::Sandbox::User", "root".to_owned()));
    options.extend(option("APT::Default-Release", format!("{codename}-backports")));
    Ok(options)
}

/// The files that apt reads: `sources.list` and `sources.list.d/*.{list,sources}`.
fn sources() -> Result<Vec<PathBuf>> {
    let mut paths = vec![PathBuf::from("/etc/apt/sources.list")];
    for entry in fs::read_dir("/etc/apt/sources.list.d").context("listing apt's sources")? {
        paths.push(entry.context("listing apt's sources")?.path());
    }
    paths.retain(|path| {
        path.is_file() && path.extension().is_some_and(|ext| ext == "list" || ext == "sources")
    });
    Ok(paths)
}

/// The entry of `text` for the release itself, with the backports suite in its place. Both of apt's formats.
fn backports_entry(text: &str, codename: &str) -> Option<String> {
    let suite = format!("{codename}-backports");
    for stanza in text.split("\n\n") {
        let is_release = |line: &str| {
            line.strip_prefix("Suites:")
                .is_some_and(|suites| suites.split_whitespace().any(|word| word == codename))
        };
        if stanza.lines().any(is_release) {
            let replaced = stanza.lines().map(|line| {
                if is_release(line) { format!("Suites: {suite}") } else { line.to_owned() }
            });
            return Some(replaced.collect::<Vec<_>>().join("\n") + "\n");
        }
    }
    text.lines()
        .find(|line| {
            line.starts_with("deb ") && line.split_whitespace().any(|word| word == codename)
        })
        .map(|line| line.replacen(&format!(" {codename} "), &format!(" {suite} "), 1) + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backports_entry_is_the_releases_own_with_another_suite() {
        let deb822 = "Types: deb\nURIs: http://mirror.example/security\nSuites: name-security\nSigned-By: /k\n\n\
                      Types: deb\nURIs: http://mirror.example/debian\nSuites: name name-updates\nSigned-By: /k\n";
        let entry = backports_entry(deb822, "name").expect("there is one");
        assert_eq!(
            entry,
            "Types: deb\nURIs: http://mirror.example/debian\nSuites: name-backports\nSigned-By: /k\n"
        );
        let list = "# deb http://mirror.example/debian name main\ndeb http://mirror.example/debian name main\n";
        let entry = backports_entry(list, "name").expect("there is one");
        assert_eq!(entry, "deb http://mirror.example/debian name-backports main\n");
        assert_eq!(backports_entry(list, "other"), None);
    }
}
