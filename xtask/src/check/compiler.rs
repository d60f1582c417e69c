//! rustfmt and clippy, for the host's crates, the metal's, and the guests'.

use std::process::Command;

use crate::fetch::toolchain::METAL_TARGET;
use crate::{image, workspace};

/// Each check with its name.
pub fn commands() -> Vec<(&'static str, Command)> {
    let mut commands = Vec::new();
    let mut format = workspace::cargo();
    format.args(["fmt", "--all", "--check"]);
    commands.push(("format", format));

    let mut host = workspace::cargo();
    host.args(["clippy", "--quiet", "--all-targets", "--", "-D", "warnings"]);
    commands.push(("clippy, host", host));

    let mut metal = image::cargo("clippy");
    metal.args(["--package", "entresol-metal-arm64", "--quiet", "--", "-D", "warnings"]);
    commands.push(("clippy, metal", metal));

    let guests = workspace::root().join("tests/guests");
    if guests.join("Cargo.toml").is_file() {
        let mut format = workspace::cargo();
        format.current_dir(&guests).args(["fmt", "--all", "--check"]);
        commands.push(("format, guests", format));
        let mut clippy = workspace::cargo();
        clippy.current_dir(&guests).args([
            "clippy",
            "--workspace",
            "--quiet",
            "--target",
            METAL_TARGET,
            "--",
            "-D",
            "warnings",
        ]);
        commands.push(("clippy, guests", clippy));
    }
    commands
}
