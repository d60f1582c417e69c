//! The machine's own package sources, read to reuse its mirrors: both of apt's formats, sources.list(5).
//!
//! Pure: text in, [`Source`]s out. Options that we have no use for are skipped, never refused; a line that apt itself
//! would refuse is skipped too, because apt is the one to complain about it.

/// One enabled source of binary packages: apt's `deb` lines and stanzas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    pub uris: Vec<String>,
    pub suites: Vec<String>,
    pub components: Vec<String>,
    /// Key file, or empty when apt's trusted set decides.
    pub signed_by: String,
}

/// Where a distribution's packages come from on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirrors {
    pub main: String,
    pub security: Option<String>,
}

/// Reads a one-line-format file (`*.list`).
pub fn parse_list(text: &str) -> Vec<Source> {
    text.lines().filter_map(parse_list_line).collect()
}

fn parse_list_line(line: &str) -> Option<Source> {
    let line = line.split('#').next().unwrap_or_default().trim();
    let mut rest = line.strip_prefix("deb")?.strip_prefix([' ', '\t'])?.trim_start();
    let mut signed_by = String::new();
    if let Some(inside) = rest.strip_prefix('[') {
        let (options, after) = inside.split_once(']')?;
        rest = after.trim_start();
        for option in options.split_whitespace() {
            if let Some(key) = option.strip_prefix("signed-by=") {
                signed_by = key.to_owned();
            }
        }
    }
    let mut words = rest.split_whitespace().map(str::to_owned);
    let (uri, suite) = (words.next()?, words.next()?);
    Some(Source { uris: vec![uri], suites: vec![suite], components: words.collect(), signed_by })
}

/// Reads a deb822-format file (`*.sources`).
pub fn parse_deb822(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain(std::iter::once("")) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            sources.extend(stanza(&fields));
            fields.clear();
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push(' ');
                value.push_str(line.trim());
            }
        } else if let Some((name, value)) = line.split_once(':') {
            fields.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    sources
}

fn stanza(fields: &[(String, String)]) -> Option<Source> {
    let field = |name: &str| fields.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str()).unwrap_or_default();
    let words = |name: &str| field(name).split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let off =
        matches!(field("enabled").to_ascii_lowercase().as_str(), "no" | "false" | "off" | "0" | "without" | "disable");
    let source = Source {
        uris: words("uris"),
        suites: words("suites"),
        components: words("components"),
        signed_by: field("signed-by").to_owned(),
    };
    (!off && words("types").iter().any(|t| t == "deb") && !source.uris.is_empty() && !source.suites.is_empty())
        .then_some(source)
}

/// The mirrors of Debian itself among a machine's sources.
///
/// A third party's source is told from Debian's by its own key: Debian's names the archive keyring, or none at all.
pub fn debian_mirrors(sources: &[Source]) -> Option<Mirrors> {
    let of_debian = |source: &&Source| {
        (source.signed_by.is_empty() || source.signed_by.contains("debian-archive"))
            && source.components.iter().any(|c| c == "main")
    };
    let is_release = |suite: &String| !suite.contains(['-', '/']);
    let is_security = |suite: &String| suite.ends_with("-security");
    let first = |wanted: &dyn Fn(&String) -> bool| {
        let found = sources.iter().filter(of_debian).find(|source| source.suites.iter().any(wanted))?;
        Some(found.uris[0].trim_end_matches('/').to_owned())
    };
    Some(Mirrors { main: first(&is_release)?, security: first(&is_security) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "\
Types: deb deb-src
# a remark
URIs: http://mirror.example/debian/
Suites: bookworm bookworm-updates
Components: main
 contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main

Types: deb
Enabled: no
URIs: http://off.example/debian
Suites: bookworm
Components: main
";

    #[test]
    fn stanzas_are_read_with_folded_lines_and_without_disabled_ones() {
        let sources = parse_deb822(DEB822);
        assert_eq!(sources.len(), 2);
        assert_eq!(sources[0].components, ["main", "contrib"]);
        assert_eq!(sources[0].signed_by, "/usr/share/keyrings/debian-archive-keyring.gpg");
        let mirrors = debian_mirrors(&sources).unwrap();
        assert_eq!(mirrors.main, "http://mirror.example/debian");
        assert_eq!(mirrors.security.as_deref(), Some("http://mirror.example/debian-security"));
    }

    #[test]
    fn one_line_sources_are_read_with_and_without_options() {
        let text = "# deb http://no.example x main\ndeb-src http://no.example bookworm main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://third.example bookworm main # why\n\
                    deb http://mirror.example/debian bookworm main non-free\n";
        let sources = parse_list(text);
        assert_eq!(sources.len(), 2);
        assert_eq!(sources[0].signed_by, "/k.gpg");
        assert_eq!(
            debian_mirrors(&sources).unwrap(),
            Mirrors { main: "http://mirror.example/debian".into(), security: None }
        );
    }

    #[test]
    fn no_debian_source_means_no_mirror() {
        assert_eq!(
            debian_mirrors(&parse_list("deb https://third.example nodistro main")).map(|m| m.main),
            Some("https://third.example".into())
        );
        assert_eq!(debian_mirrors(&parse_list("deb [signed-by=/other.gpg] https://third.example bookworm main")), None);
        assert_eq!(debian_mirrors(&[]), None);
    }

    #[test]
    fn nothing_in_a_cut_off_file_panics() {
        for end in 0..DEB822.len() {
            let _ = debian_mirrors(&parse_deb822(&DEB822[..end]));
            let _ = debian_mirrors(&parse_list(&DEB822[..end]));
        }
        assert!(parse_list("deb [signed-by=/k").is_empty());
    }
}
