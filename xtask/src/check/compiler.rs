//! rustfmt and clippy, for the host's crates, the metal's, and the guests'.

use std::process::Command;

use crate::fetch::toolchain::{METAL_TARGET, METAL_X86_TARGET};
use crate::guests::LINUX_TARGET;
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

    let mut metal = image::cargo_x86("clippy");
    metal.args(["--package", "entresol-metal-x86", "--quiet", "--", "-D", "warnings"]);
    commands.push(("clippy, metal of x86-64", metal));

    let guests =
        [("tests/guests", METAL_TARGET), ("tests/guests/linux", LINUX_TARGET), ("tests/guests/x86", METAL_X86_TARGET)];
    for (folder, target) in guests {
        let folder = workspace::root().join(folder);
        let mut format = workspace::cargo();
        format.current_dir(&folder).args(["fmt", "--all", "--check"]);
        commands.push(("format, guests", format));
        let mut clippy = workspace::cargo();
        clippy.current_dir(&folder);
        clippy.args(["clippy", "--workspace", "--quiet", "--target", target, "--", "-D", "warnings"]);
        commands.push(("clippy, guests", clippy));
    }
    commands
}
