//! `cargo xtask browser REPORT.html`: a report as a real browser lays it out, at the width of a desktop and of a phone.
//!
//! A page of its own holds the report in frames of these widths, and writes down what it finds there; headless Chromium
//! prints that page.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};
use serde::Deserialize;

use crate::process;

/// Names that the browser has on the systems that it comes with.
const BROWSERS: [&str; 4] = ["chromium", "chromium-browser", "google-chrome", "chrome"];
const BEGIN: &str = "<pre id=\"found\">";

#[derive(clap::Args)]
#[command(after_help = "\
Needs Chromium or Chrome (Debian: chromium); CHROME names another one.

Example:
  cargo xtask browser target/bench-all/report.html")]
pub(crate) struct Arguments {
    /// HTML that `roofbench report --html` or `cargo xtask bench-all` wrote
    #[arg(required = true, value_name = "REPORT")]
    reports: Vec<PathBuf>,
}

/// A frame with the report in it.
#[derive(Debug, Deserialize)]
struct Frame {
    /// CSS pixels.
    width: u32,
    /// Of what the report asks for: light or dark.
    scheme: String,
    /// Pixels that the page is wider than its frame.
    overflow: i64,
    /// What lies beyond the right edge, and no part that scrolls by itself holds it.
    beyond: Vec<String>,
    scripts: usize,
    /// Addresses that were loaded.
    requests: Vec<String>,
    sections: usize,
    /// Plots, and those that take no space.
    plots: usize,
    invisible: usize,
    background: String,
}

/// Looks at each report.
///
/// # Errors
/// There is no browser, or a report is not as it should be: which, and what.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let folder = process::target()?.join("browser");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    for report in &arguments.reports {
        let frames = frames(report, &folder).with_context(|| report.display().to_string())?;
        check(&frames).with_context(|| report.display().to_string())?;
        let first = frames.first().context("no frames")?;
        eprintln!("{}: {} sections and {} plots fit", report.display(), first.sections, first.plots);
    }
    Ok(())
}

fn check(frames: &[Frame]) -> anyhow::Result<()> {
    for frame in frames {
        let at = format!("{} pixels wide, {}", frame.width, frame.scheme);
        ensure!(frame.overflow <= 0, "{at}: {} pixels too wide: {}", frame.overflow, frame.beyond.join(", "));
        ensure!(frame.scripts == 0, "{at}: it has scripts, and is to be readable without");
        ensure!(frame.requests.is_empty(), "{at}: it loads {}", frame.requests.join(", "));
        ensure!(frame.sections > 0 && frame.plots > 0, "{at}: it is empty");
        ensure!(frame.invisible == 0, "{at}: {} of {} plots take no space", frame.invisible, frame.plots);
    }
    let backgrounds: Vec<_> = frames.iter().map(|frame| &frame.background).collect();
    ensure!(backgrounds.windows(2).any(|two| two[0] != two[1]), "light and dark look alike: {backgrounds:?}");
    Ok(())
}

fn frames(report: &Path, folder: &Path) -> anyhow::Result<Vec<Frame>> {
    let report = fs::canonicalize(report)?;
    let page = folder.join("page.html");
    fs::write(&page, PAGE.replace("REPORT", &format!("file://{}", report.display())))?;
    let printed = process::output(
        browser()?
            .args(["--headless", "--disable-gpu", "--no-sandbox", "--allow-file-access-from-files", "--dump-dom"])
            .arg("--virtual-time-budget=60000")
            .arg(format!("file://{}", page.display())),
    )?;
    let found = printed.split_once(BEGIN).and_then(|(_, rest)| rest.split_once("</pre>"));
    let (found, _) = found.context("the browser did not print what the page found")?;
    let found = found.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&");
    serde_json::from_str(&found).with_context(|| format!("what the page found: {found}"))
}

fn browser() -> anyhow::Result<Command> {
    if let Some(chrome) = std::env::var_os("CHROME") {
        return Ok(Command::new(chrome));
    }
    for name in BROWSERS {
        if Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success()) {
            return Ok(Command::new(name));
        }
    }
    bail!(
        "no browser: none of {} is on the path; install Chromium (Debian: chromium), or set CHROME",
        BROWSERS.join(", ")
    )
}

/// The page; REPORT is the report's address.
const PAGE: &str = r#"<!doctype html>
<meta charset="utf-8">
<body>
<script>
const wanted = [[1280, "light"], [1280, "dark"], [390, "light"], [390, "dark"]];
const scrolls = (element) => {
  for (let one = element.parentElement; one; one = one.parentElement) {
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(one).overflowX)) return true;
  }
  return false;
};
const look = (frame, width, scheme) => {
  const page = frame.contentDocument, root = page.scrollingElement;
  const plots = [...page.querySelectorAll("svg")];
  const beyond = [...page.body.querySelectorAll("*")]
    .filter((one) => one.getBoundingClientRect().right > root.clientWidth + 1 && !scrolls(one))
    .slice(0, 5)
    .map((one) => one.tagName.toLowerCase() + " " + one.textContent.trim().slice(0, 40));
  return {
    width, scheme, beyond,
    overflow: root.scrollWidth - root.clientWidth,
    scripts: page.scripts.length,
    requests: frame.contentWindow.performance.getEntriesByType("resource").map((one) => one.name),
    sections: page.querySelectorAll("section").length,
    plots: plots.length,
    invisible: plots.filter((one) => !one.closest("details:not([open])") && one.getBoundingClientRect().width < 1).length,
    background: frame.contentWindow.getComputedStyle(page.body).backgroundColor
      + " " + frame.contentWindow.getComputedStyle(page.body).color,
  };
};
Promise.all(wanted.map(([width, scheme]) => new Promise((done) => {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0; color-scheme: ${scheme}`;
  frame.onload = () => done(look(frame, width, scheme));
  frame.src = "REPORT";
  document.body.append(frame);
}))).then((found) => {
  const text = document.createElement("pre");
  text.id = "found";
  text.textContent = JSON.stringify(found);
  document.body.append(text);
});
</script>
"#;

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(scheme: &str) -> Frame {
        Frame {
            width: 390,
            scheme: scheme.to_owned(),
            overflow: 0,
            beyond: Vec::new(),
            scripts: 0,
            requests: Vec::new(),
            sections: 3,
            plots: 2,
            invisible: 0,
            background: scheme.to_owned(),
        }
    }

    #[test]
    fn what_is_wrong_with_a_report_is_said() {
        check(&[frame("light"), frame("dark")]).unwrap();
        let wrong = |change: fn(&mut Frame)| {
            let mut frames = [frame("light"), frame("dark")];
            change(&mut frames[1]);
            check(&frames).unwrap_err().to_string()
        };
        assert!(wrong(|frame| frame.overflow = 12).contains("390 pixels wide, dark: 12 pixels too wide"));
        assert!(wrong(|frame| frame.scripts = 1).contains("scripts"));
        assert!(wrong(|frame| frame.requests.push("https://cdn".into())).contains("loads https://cdn"));
        assert!(wrong(|frame| frame.plots = 0).contains("empty"));
        assert!(wrong(|frame| frame.invisible = 2).contains("2 of 2 plots"));
        assert!(wrong(|frame| frame.background = "light".into()).contains("look alike"));
    }
}
