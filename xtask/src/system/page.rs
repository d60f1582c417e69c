//! The lab's page of a trace, in a browser: what a person must see is there, in its place, and has its colour.
//!
//! A copy of the page gets a script that measures boxes and writes them into the document; the browser prints the
//! document, and paints the page as it is into a picture. Boxes say where things are, pixels that they were painted.

use std::fs::{self, File};
use std::io::BufReader;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use super::Context;
use crate::fetch::browser::Window;
use crate::fetch::{self, Browser};
use crate::workspace;

const WINDOW: Window = Window { width: 1500, height: 900 };
/// What the owner put there, and what memory held before: frames are poisoned.
const WRITTEN: &str = "0x55";
const POISON: &str = "0xdeadf4eedeadf4ee";

const PROBE: &str = include_str!("probe.js");

/// What the probe measured, in pixels of the window.
#[derive(Debug, Deserialize)]
struct Seen {
    lanes: Vec<Piece>,
    headings: Vec<Piece>,
    cards: Vec<Piece>,
    dirty: Vec<Piece>,
    lag: Vec<Piece>,
    found: Piece,
    violation: Piece,
    /// Scripts, the probe's not counted, and files that were loaded.
    foreign: usize,
    /// Pixels that one must scroll sideways.
    hidden: f64,
}

/// One thing on the page.
#[derive(Clone, Debug, Deserialize)]
struct Piece {
    text: String,
    /// The step of its row, if it stands in one.
    step: String,
    x: f64,
    y: f64,
    width: f64,
    height: f64,
}

impl Piece {
    fn is_visible(&self) -> bool {
        self.width > 8.0 && self.height > 8.0 && self.x >= 0.0 && self.y >= 0.0
    }

    /// Whether it lies in the column of `heading`.
    fn is_below(&self, heading: &Piece) -> bool {
        let centre = self.x + self.width / 2.0;
        heading.x <= centre && centre < heading.x + heading.width && self.y >= heading.y + heading.height - 1.0
    }
}

/// The bug of 2018 on a page: two lanes, the dirty line, memory that differs from it, and the step that read it.
pub fn lab_page_shows_the_stale_line(context: &Context) -> Result<()> {
    let folder = context.work.join("lab_page_shows_the_stale_line");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let page = folder.join("trace.html");
    make(&page)?;
    let browser = fetch::browser()?;
    let seen = measure(&browser, &page, &folder.join("measured.html"))?;
    check(&seen)?;
    let picture = folder.join("trace.png");
    browser.picture(&page, WINDOW, &picture)?;
    painted(&seen, &picture).with_context(|| format!("look at {}", picture.display()))
}

/// The lab finds the planted bug, and says so by its exit status.
fn make(page: &Path) -> Result<()> {
    let mut lab = workspace::cargo();
    lab.args(["run", "--quiet", "--package", "entresol-cli", "--bin", "entresol", "--", "lab", "run"]);
    lab.args(["lab/mmu-off.toml", "--plant", "Z-A1", "--only", "INV-11", "--html"]).arg(page);
    let output = lab.output().context("cannot start the lab")?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.code() == Some(1) && said.contains("INV-11"),
        "the lab did not find Z-A1: {}\n{said}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

fn measure(browser: &Browser, page: &Path, copy: &Path) -> Result<Seen> {
    let text = fs::read_to_string(page).with_context(|| format!("cannot read {}", page.display()))?;
    let (body, rest) = text.rsplit_once("</body>").context("the page has no end")?;
    let probed = format!("{body}<pre id=\"probe\" hidden></pre><script>{PROBE}</script></body>{rest}");
    fs::write(copy, probed).with_context(|| format!("cannot write {}", copy.display()))?;
    let document = browser.document(copy, WINDOW)?;
    let measured =
        document.split_once("<pre id=\"probe\" hidden=\"\">").and_then(|(_, rest)| rest.split_once("</pre>"));
    let (measured, _) = measured.with_context(|| format!("the probe is not in the document:\n{document}"))?;
    let json = measured.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&");
    serde_json::from_str(&json).with_context(|| format!("the probe measured something else: {json}"))
}

fn check(seen: &Seen) -> Result<()> {
    let lanes: Vec<&str> = seen.lanes.iter().map(|lane| lane.text.as_str()).collect();
    ensure!(lanes == ["CPU 0", "CPU 1"], "a lane for each CPU is expected, not {lanes:?}");
    let [left, right] = &seen.lanes[..] else { unreachable!("there are two") };
    ensure!(left.x + left.width <= right.x + 1.0, "lanes lie on each other: {:?}", seen.lanes);
    for piece in seen.lanes.iter().chain(&seen.cards).chain(&seen.dirty).chain([&seen.found, &seen.violation]) {
        ensure!(piece.is_visible(), "cannot be seen: {piece:?}");
    }
    ensure!(!seen.cards.is_empty(), "nothing happened on any CPU");
    for card in &seen.cards {
        ensure!(seen.lanes.iter().any(|lane| card.is_below(lane)), "stands in no lane: {card:?}");
    }
    let heading =
        |name: &str| seen.headings.iter().find(|heading| heading.text == name).context("a heading is missing");
    let dirty = named(&seen.dirty, WRITTEN)?;
    ensure!(dirty.is_below(heading("in the cache")?), "stands in another column: {dirty:?}");
    let lag = named(&seen.lag, POISON)?;
    ensure!(lag.is_below(heading("in memory")?), "stands in another column: {lag:?}");
    ensure!(lag.step == dirty.step, "the line and memory are of different steps: {dirty:?}, {lag:?}");
    let last = seen.cards.last().context("there is one")?;
    ensure!(last.text.contains(POISON), "the last event is the stale read, not {last:?}");
    let end = &seen.violation;
    ensure!(end.step == last.step && end.y >= last.y + last.height - 1.0, "{end:?} does not follow {last:?}");
    for said in [&seen.found.text, &end.text] {
        ensure!(said.contains("INV-11") && said.contains(POISON), "the finding is not told: {said:?}");
    }
    ensure!(seen.foreign == 0, "the page is not self-contained: {} scripts and files", seen.foreign);
    ensure!(seen.hidden < 1.0, "{} pixels are hidden at the side", seen.hidden);
    Ok(())
}

fn named<'a>(pieces: &'a [Piece], text: &str) -> Result<&'a Piece> {
    pieces.iter().find(|piece| piece.text == text).with_context(|| format!("{text} is not among {pieces:?}"))
}

/// The colours that tell states apart are painted where the boxes are.
fn painted(seen: &Seen, picture: &Path) -> Result<()> {
    let file = File::open(picture).with_context(|| format!("cannot open {}", picture.display()))?;
    let mut decoder = png::Decoder::new(BufReader::new(file));
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let mut reader = decoder.read_info().context("not a PNG")?;
    let mut pixels = vec![0; reader.output_buffer_size().context("a picture too large")?];
    let info = reader.next_frame(&mut pixels).context("a PNG that is cut off")?;
    ensure!((info.width, info.height) == (WINDOW.width, WINDOW.height), "{} x {} pixels", info.width, info.height);
    let samples = info.color_type.samples();
    let colour = |x: f64, y: f64| -> Result<[u8; 3]> {
        let at = y as usize * info.line_size + x as usize * samples;
        let pixel = pixels.get(at..at + 3).with_context(|| format!("{x}, {y} is outside the window"))?;
        Ok([pixel[0], pixel[1], pixel[2]])
    };
    // A corner of a box shows its ground, and none of its letters.
    let corner = |piece: &Piece| colour(piece.x + 3.0, piece.y + 3.0);
    let paper = colour(2.0, 2.0)?;
    let [dirty, lag] = [corner(named(&seen.dirty, WRITTEN)?)?, corner(named(&seen.lag, POISON)?)?];
    let end = corner(&seen.violation)?;
    ensure!(dirty != paper && lag != paper && dirty != lag, "dirty {dirty:?} and stale {lag:?} on {paper:?}");
    ensure!(end != paper, "the end of the schedule is not marked: {end:?}");
    let card = seen.cards.first().context("there is one")?;
    let inked = (0..card.width as u32).map(|x| colour(card.x + f64::from(x), card.y + card.height / 2.0));
    let shades: std::collections::BTreeSet<[u8; 3]> = inked.collect::<Result<_>>()?;
    ensure!(shades.len() > 4, "no letters are painted in {card:?}: {shades:?}");
    Ok(())
}
