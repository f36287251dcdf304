//! The page in a real browser: a headless Chromium, spoken to over two pipes (the DevTools
//! protocol). Where there is none, the test says that it was skipped.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

/// How long an answer may take before the browser counts as hung.
const PATIENCE: Duration = Duration::from_secs(120);

fn chromium() -> Option<PathBuf> {
    let folders = std::env::var_os("PATH")?;
    let names = ["chromium", "chromium-browser", "google-chrome"];
    std::env::split_paths(&folders)
        .flat_map(|folder| names.map(|name| folder.join(name)))
        .find(|file| file.is_file())
}

struct Browser {
    process: Child,
    to: File,
    from: Receiver<Value>,
    session: Option<String>,
    calls: u64,
    loaded: bool,
    /// Exceptions, and whatever the page wrote to the console.
    complaints: Vec<String>,
    _folder: TempDir,
}

impl Browser {
    /// Starts one with a page of `width` × `height`; none if there is no Chromium, or no `mkfifo`.
    fn start() -> Option<Self> {
        let chromium = chromium()?;
        let folder = TempDir::new().unwrap();
        let [to, from] = ["to", "from"].map(|name| folder.path().join(name));
        let made = Command::new("mkfifo").args([&to, &from]).status().ok()?;
        assert!(made.success());
        let process = Command::new("sh")
            .arg("-c")
            .arg(r#"to=$1; from=$2; shift 2; exec "$@" 3<"$to" 4>"$from""#)
            .arg("sh")
            .args([&to, &from, &chromium])
            .args([
                "--headless",
                "--remote-debugging-pipe",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--hide-scrollbars",
            ])
            .arg(format!(
                "--user-data-dir={}",
                folder.path().join("profile").display()
            ))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let to = File::options().write(true).open(to).unwrap();
        let from = BufReader::new(File::open(from).unwrap());
        let (send, receive) = channel();
        std::thread::spawn(move || {
            for message in from.split(0).map_while(Result::ok) {
                let message = serde_json::from_slice(&message).unwrap();
                if send.send(message).is_err() {
                    return;
                }
            }
        });
        let mut browser = Self {
            process,
            to,
            from: receive,
            session: None,
            calls: 0,
            loaded: false,
            complaints: Vec::new(),
            _folder: folder,
        };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"}));
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let session = browser.call("Target.attachToTarget", attach);
        browser.session = session["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        Some(browser)
    }

    fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.calls += 1;
        let id = self.calls;
        let mut message = json!({"id": id, "method": method, "params": parameters});
        if let Some(session) = &self.session {
            message["sessionId"] = session.as_str().into();
        }
        let mut bytes = message.to_string().into_bytes();
        bytes.push(0);
        self.to.write_all(&bytes).unwrap();
        loop {
            let mut message = self.receive();
            if message["id"].as_u64() == Some(id) {
                assert!(message["error"].is_null(), "{method}: {}", message["error"]);
                return message["result"].take();
            }
        }
    }

    fn receive(&mut self) -> Value {
        let message = self
            .from
            .recv_timeout(PATIENCE)
            .expect("the browser answers");
        match message["method"].as_str() {
            // Warnings are about this test, which reads canvases.
            Some("Log.entryAdded") if message["params"]["entry"]["level"] != "error" => {}
            Some("Runtime.exceptionThrown" | "Runtime.consoleAPICalled" | "Log.entryAdded") => {
                self.complaints.push(message["params"].to_string());
            }
            Some("Page.loadEventFired") => self.loaded = true,
            _ => {}
        }
        message
    }

    fn open(&mut self, page: &Path) {
        self.loaded = false;
        self.call(
            "Page.navigate",
            json!({"url": format!("file://{}", page.display())}),
        );
        while !self.loaded {
            self.receive();
        }
    }

    /// The value of an expression; promises are waited for.
    fn value(&mut self, expression: &str) -> Value {
        let parameters =
            json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let mut result = self.call("Runtime.evaluate", parameters);
        assert!(
            result["exceptionDetails"].is_null(),
            "{expression}: {result}"
        );
        result["result"]["value"].take()
    }

    fn text(&mut self, selector: &str) -> String {
        let value = self.value(&format!("document.querySelector('{selector}').textContent"));
        value.as_str().unwrap().to_owned()
    }

    fn number(&mut self, expression: &str) -> f64 {
        let value = self.value(expression);
        value
            .as_f64()
            .unwrap_or_else(|| panic!("{expression} is {value}"))
    }

    fn key(&mut self, key: &str) {
        for kind in ["rawKeyDown", "keyUp"] {
            let code = if key == " " { "Space" } else { key };
            let event = json!({"type": kind, "key": key, "code": code});
            self.call("Input.dispatchKeyEvent", event);
        }
    }

    fn mouse(&mut self, kind: &str, (x, y): (f64, f64)) {
        let event = json!({"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1});
        self.call("Input.dispatchMouseEvent", event);
    }

    fn click(&mut self, at: (f64, f64)) {
        for kind in ["mouseMoved", "mousePressed", "mouseReleased"] {
            self.mouse(kind, at);
        }
    }

    /// The middle of an element, scrolled into view.
    fn middle(&mut self, selector: &str) -> (f64, f64) {
        let point = self.value(&format!(
            "(() => {{ const e = document.querySelector('{selector}'); \
             e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect(); \
             return [r.x + r.width / 2, r.y + r.height / 2]; }})()"
        ));
        let point = numbers(&point);
        (point[0], point[1])
    }

    /// A checksum of a canvas's pixels.
    fn pixels(&mut self, id: &str) -> f64 {
        self.number(&format!(
            "(() => {{ const c = document.getElementById('{id}'); let sum = 0; \
             const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; \
             for (let i = 0; i < d.length; i++) sum = (sum * 31 + d[i]) % 2147483647; \
             return sum; }})()"
        ))
    }

    fn screen(&mut self, width: u32, height: u32, scheme: &str) {
        let metrics =
            json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        self.call("Emulation.setDeviceMetricsOverride", metrics);
        let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        self.call("Emulation.setEmulatedMedia", json!({"features": features}));
        // The page draws again in the next frame.
        self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))");
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A page in a file, opened in a browser; none if there is no browser.
fn opened(made: &Made, episode: u64) -> Option<(Browser, Value, TempDir)> {
    let Some(mut browser) = Browser::start() else {
        eprintln!("SKIPPED: no chromium on the PATH, or no mkfifo");
        return None;
    };
    let folder = TempDir::new().unwrap();
    let shown = made.show(episode);
    let file = folder.path().join("episode.html");
    shown.write(&file).unwrap();
    browser.screen(1400, 1000, "light");
    browser.open(&file);
    Some((browser, data(&shown.html), folder))
}

/// Position of cell (row, column) of the map in the window, from the margins that its axes take.
fn map_cell(browser: &mut Browser, tokens: usize, row: usize, column: usize) -> (f64, f64) {
    browser.middle("#map");
    let rect = numbers(&browser.value(
        "(() => { const r = document.getElementById('map').getBoundingClientRect(); \
         return [r.x, r.y, r.width]; })()",
    ));
    let unit = (rect[2] - 52.0) / tokens as f64;
    (
        rect[0] + 46.0 + (column as f64 + 0.5) * unit,
        rect[1] + 6.0 + (row as f64 + 0.5) * unit,
    )
}

/// Brightness of the map at a place of the window.
fn brightness(browser: &mut Browser, (x, y): (f64, f64)) -> f64 {
    browser.number(&format!(
        "(() => {{ const c = document.getElementById('map'), r = c.getBoundingClientRect(); \
         const d = c.getContext('2d').getImageData({x} - r.x, {y} - r.y, 1, 1).data; \
         return d[0] + d[1] + d[2]; }})()"
    ))
}

#[test]
fn a_browser_moves_through_the_steps_and_draws_what_the_data_says() {
    let made = make(HALLWAY, &[], 4);
    let Some((mut browser, page, _folder)) = opened(&made, 1) else {
        return;
    };
    let last = page["steps"].as_array().unwrap().len() - 1;
    assert!(last > 3);
    assert_eq!(
        browser.text("#verdict-text"),
        page["verdict"].as_str().unwrap()
    );
    assert!(browser.text("#title").contains("Hallway, episode 1"));
    assert_eq!(
        browser.value("matchMedia('(prefers-color-scheme: light)').matches"),
        true
    );
    let focus = page["focus"].as_u64().unwrap() as usize;
    assert_eq!(
        browser.number("document.getElementById('slider').value | 0"),
        focus as f64
    );

    // Keys, the slider, the strip and the button all move to a step; text and pictures follow.
    let actions = page["actions"].as_array().unwrap();
    let action = |step: usize| {
        let taken = page["steps"][step]["action"].as_u64().unwrap() as usize;
        actions[taken].as_str().unwrap().to_owned()
    };
    let moves: [(&str, usize); 5] = [
        ("Home", 0),
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("End", last),
    ];
    for (key, step) in moves {
        browser.key(key);
        let readout = browser.text("#readout");
        let wanted = format!("Step {step} of {last}: {}", action(step));
        assert!(readout.starts_with(&wanted), "{readout}, expected {wanted}");
        assert_eq!(
            browser.number("document.getElementById('slider').value | 0"),
            step as f64
        );
        let current = browser.text("#strip [aria-current] span:not(.mark)");
        assert_eq!(current, step.to_string());
    }
    // The expert turns left first, so the view changes; an untrained agent may stand still.
    let frames = (0..=last).map(|step| page["frames"]["steps"][step].as_str().unwrap());
    let frames: Vec<&str> = frames.collect();
    let mut drawn = Vec::new();
    for step in 0..=last {
        browser.value(&format!(
            "(() => {{ const s = document.getElementById('slider'); s.value = {step}; \
             s.dispatchEvent(new Event('input')); }})()"
        ));
        drawn.push((browser.pixels("frame"), browser.pixels("map")));
    }
    for step in 1..=last {
        let same = frames[step] == frames[step - 1];
        assert_eq!(
            drawn[step].0 == drawn[step - 1].0,
            same,
            "frame of step {step}"
        );
        assert_ne!(
            drawn[step].1,
            drawn[step - 1].1,
            "the map marks step {step}"
        );
    }
    let place = browser.middle("#strip button:nth-child(2)");
    browser.click(place);
    assert!(browser.text("#readout").starts_with("Step 1 "));
    let place = browser.middle("#go");
    browser.click(place);
    assert!(
        browser
            .text("#readout")
            .starts_with(&format!("Step {focus} "))
    );

    // Probabilities as in the data.
    let shown =
        browser.value("[...document.querySelectorAll('#actions .value')].map(e => e.textContent)");
    for (shown, p) in shown
        .as_array()
        .unwrap()
        .iter()
        .zip(numbers(&page["steps"][focus]["probabilities"]))
    {
        let wanted = if p < 0.005 {
            "<0.01".to_owned()
        } else {
            format!("{p:.2}")
        };
        assert_eq!(shown.as_str().unwrap(), wanted);
    }

    // The map: the taught head is shown first; the more attention, the darker; hovering says it.
    let tokens = 2 * (last + 1);
    let heads = page["attention"].as_array().unwrap();
    let taught = heads.iter().find(|head| head["taught"] == true).unwrap();
    assert!(browser.text("#map-title").starts_with("Layer 2, head 1"));
    let map = decode(taught["map"].as_str().unwrap(), (tokens, tokens)).unwrap();
    let row = 2 * last;
    let cells = |least: bool| {
        let row = map.row(row);
        let key = |a: &usize, b: &usize| row[*a].total_cmp(&row[*b]);
        let columns = 0..=2 * last;
        if least {
            columns.min_by(key)
        } else {
            columns.max_by(key)
        }
        .unwrap()
    };
    browser.key("Home");
    let [dark, light] = [cells(false), cells(true)].map(|column| {
        let place = map_cell(&mut browser, tokens, row, column);
        brightness(&mut browser, place)
    });
    assert!(dark < light, "{dark} {light}");
    let place = map_cell(&mut browser, tokens, row, cells(false));
    browser.mouse("mouseMoved", place);
    let tip = browser.text("#tip");
    let wanted = format!("Probability {:.3}", map[[row, cells(false)]]);
    assert!(
        tip.contains(&format!("Step {last}, observation")) && tip.contains(&wanted),
        "{tip}"
    );
    assert_eq!(
        browser.value("document.getElementById('tip').hidden"),
        false
    );
    let before = browser.pixels("map");
    let place = browser.middle("#heads button:nth-of-type(2)");
    browser.click(place);
    assert!(browser.text("#map-title").starts_with("Layer 1, head 2"));
    assert_ne!(browser.pixels("map"), before);
    assert_eq!(browser.value("document.getElementById('tip').hidden"), true);
    // Clicking into the map goes to the step that looks.
    let place = map_cell(&mut browser, tokens, 3, 1);
    browser.click(place);
    assert!(browser.text("#readout").starts_with("Step 1 "));

    // Playing goes on by itself, to the end, and stops.
    browser.key("End");
    browser.key("ArrowLeft");
    browser.key("ArrowLeft");
    browser.key(" ");
    assert_eq!(browser.text("#play"), "❚❚ Pause");
    browser.value(
        "new Promise(done => { const wait = () => \
         document.getElementById('play').getAttribute('aria-label') === 'Play' ? done() : \
         setTimeout(wait, 50); wait(); })",
    );
    assert!(
        browser
            .text("#readout")
            .starts_with(&format!("Step {last} "))
    );

    assert_eq!(
        browser.number("performance.getEntriesByType('resource').length"),
        0.0
    );
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
}

#[test]
fn a_browser_shows_the_memory_and_fits_every_screen() {
    let made = make(RECALL, &[], 1);
    let Some((mut browser, page, _folder)) = opened(&made, 0) else {
        return;
    };
    assert_eq!(
        browser.value("document.getElementById('memory').hidden"),
        false
    );
    // Attention ends at segments, so the memory's map is the one that is shown.
    assert!(
        browser
            .text("#map-title")
            .starts_with("Layer 1, through the memory")
    );
    browser.key("End");
    let shown = browser.text("#recalls");
    let source = &page["steps"][9]["recalls"][0];
    assert!(shown.contains(&format!("Step {source}: key ")), "{shown}");

    // What is read, by the step that wrote it, as the data has it.
    let tokens = 30;
    let layer = &page["memory"][1];
    let recall = decode(layer["recall"].as_str().unwrap(), (tokens, tokens)).unwrap();
    let place = browser.middle("#layers button:nth-child(2)");
    browser.click(place);
    let mut shares: Vec<(f64, usize)> = (0..10)
        .map(|step| (recall.slice(s![28, 3 * step..3 * step + 3]).sum(), step))
        .collect();
    shares.sort_by(|a, b| b.0.total_cmp(&a.0));
    let first = browser.text("#reads button");
    let wanted = format!("step {}", shares[0].1);
    assert!(first.starts_with(&wanted), "{first}, expected {wanted}");
    assert!(first.ends_with(&format!("{:.2}", shares[0].0)), "{first}");

    let canvases = ["written", "address", "slots", "map", "frame"];
    let now: Vec<f64> = canvases.map(|id| browser.pixels(id)).into();
    browser.key("ArrowLeft");
    for (id, before) in canvases.iter().zip(&now) {
        assert_ne!(browser.pixels(id), *before, "{id} follows the step");
    }
    browser.key("ArrowRight");
    let again: Vec<f64> = canvases.map(|id| browser.pixels(id)).into();
    assert_eq!(now, again, "a step always looks the same");
    browser.value(
        "(() => { const o = document.getElementById('order'); o.value = 'number'; \
         o.dispatchEvent(new Event('change')); })()",
    );
    assert_ne!(browser.pixels("written"), now[0], "slots in another order");
    let place = browser.middle("#address");
    browser.mouse("mouseMoved", place);
    assert!(browser.text("#tip").starts_with("Slot "));
    let place = browser.middle("#memory-kinds button:nth-child(3)");
    browser.click(place);
    assert_ne!(browser.pixels("slots"), now[2], "another token of the step");

    // Both schemes, from a telephone to a large screen: nothing is wider than the window.
    let mut backgrounds = Vec::new();
    for scheme in ["light", "dark"] {
        for width in [360, 620, 900, 1200, 1800] {
            browser.screen(width, 900, scheme);
            let overflow = browser.number("document.documentElement.scrollWidth - innerWidth");
            assert!(
                overflow <= 0.0,
                "{overflow} pixels too wide at {width}, {scheme}"
            );
        }
        backgrounds
            .push(browser.value("getComputedStyle(document.body.parentElement).backgroundColor"));
        backgrounds.push(browser.pixels("map").into());
    }
    assert!(backgrounds[0] != backgrounds[2] && backgrounds[1] != backgrounds[3]);

    // Every control has a name.
    let nameless = browser.value(
        "[...document.querySelectorAll('button, input, select, canvas[role=img]')] \
         .filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)) \
         .map(e => e.outerHTML)",
    );
    assert_eq!(nameless, json!([]));
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
}
