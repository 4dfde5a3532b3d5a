//! The recorded exchanges with a real API server (`tests/apiserver/golden`), as requests that were made and bytes that were answered.
//! Changes no byte, and knows nothing of the client.

use std::path::Path;

use serde_json::Value;

/// A request and its answer.
#[derive(Clone)]
pub(super) struct Exchange {
    /// The recording it is in, and its place there, from 1.
    pub(super) name: String,
    /// The recorder's remark.
    pub(super) note: String,
    pub(super) method: String,
    /// With the query.
    pub(super) path: String,
    pub(super) content_type: Option<String>,
    pub(super) answer: Answer,
}

/// What comes back.
#[derive(Clone)]
pub(super) enum Answer {
    /// Nobody listens.
    Refused,
    /// These bytes, each piece so many seconds after the request; then the end.
    Sent { pieces: Vec<(f64, Vec<u8>)>, end: End },
    /// The recording left some of the bytes out.
    Abridged,
}

/// What becomes of a connection after an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum End {
    /// It waits for the next request.
    Kept,
    /// It is closed.
    Closed,
    /// It stays, and the answer was not at its end: the recorder went away first.
    Open,
}

/// All exchanges of all recordings.
pub(super) fn all() -> Vec<Exchange> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/apiserver/golden");
    let files = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
    let topic = |path: &Path| path.file_stem().unwrap().to_string_lossy().into_owned();
    // The others hold no exchanges.
    let mut files: Vec<_> = files
        .filter(|path| topic(path).starts_with(|first: char| first.is_ascii_digit()))
        .collect();
    files.sort();
    let read = |path: &Path| {
        let recording: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let exchanges = recording["exchanges"].as_array().unwrap().iter().zip(1..);
        exchanges
            .map(|(exchange, number)| Exchange::read(exchange, format!("{} {number}", topic(path))))
            .collect::<Vec<_>>()
    };
    files.iter().flat_map(|path| read(path)).collect()
}

/// One exchange, by its name.
pub(super) fn exchange(name: &str) -> Exchange {
    let found = all().into_iter().find(|exchange| exchange.name == name);
    found.unwrap_or_else(|| panic!("there is no exchange {name}"))
}

impl Exchange {
    fn read(exchange: &Value, name: String) -> Self {
        let request = &exchange["request"];
        let text = |value: &Value| value.as_str().map(str::to_owned);
        Self {
            name,
            note: text(&exchange["note"]).unwrap_or_default(),
            method: text(&request["method"]).unwrap(),
            path: text(&request["path"]).unwrap(),
            content_type: text(&request["headers"]["Content-Type"]),
            answer: Answer::read(&exchange["response"]),
        }
    }

    /// The path without the query.
    pub(super) fn resource(&self) -> &str {
        self.path.split('?').next().unwrap()
    }

    /// The value of a key of the query.
    pub(super) fn query(&self, key: &str) -> Option<&str> {
        query(&self.path)
            .find(|(found, _)| *found == key)
            .map(|(_, value)| value)
    }
}

/// Keys and values of a path's query.
pub(super) fn query(path: &str) -> impl Iterator<Item = (&str, &str)> {
    let pairs = path.split_once('?').map_or("", |(_, query)| query).split('&');
    pairs
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
}

impl Answer {
    /// An answer that nobody recorded.
    pub(super) fn made(status: &str, body: &str) -> Self {
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        Self::Sent {
            pieces: vec![(0.0, format!("{head}{body}").into_bytes())],
            end: End::Kept,
        }
    }

    fn read(response: &Value) -> Self {
        if response["error"]
            .as_str()
            .is_some_and(|error| error.contains("Connection refused"))
        {
            return Self::Refused;
        }
        let stream = response["stream"].as_array().map(|stream| {
            let piece = |one: &Value| (one["t"].as_f64().unwrap(), one["line"].as_str().unwrap().to_owned());
            stream.iter().map(piece).collect::<Vec<_>>()
        });
        match (response["status"].as_u64(), stream) {
            // These were recorded as they were on the wire.
            (None, Some(raw)) => Self::Sent {
                pieces: raw.into_iter().map(|(at, text)| (at, unescaped(&text))).collect(),
                end: End::Kept,
            },
            (Some(_), stream) => Self::of_parts(response, stream),
            (None, None) => panic!("neither an answer nor none: {response}"),
        }
    }

    /// Puts together what was recorded in parts.
    fn of_parts(response: &Value, stream: Option<Vec<(f64, String)>>) -> Self {
        let mut head = format!(
            "HTTP/1.1 {} {}\r\n",
            response["status"],
            response["reason"].as_str().unwrap()
        );
        let (mut length, mut chunked, mut close) = (None, false, false);
        for header in response["headers"].as_array().unwrap() {
            let (name, value) = (header[0].as_str().unwrap(), header[1].as_str().unwrap());
            head += &format!("{name}: {value}\r\n");
            match name {
                "Content-Length" => length = Some(value.parse::<usize>().unwrap()),
                "Transfer-Encoding" => chunked = value == "chunked",
                "Connection" => close = value == "close",
                _ => {}
            }
        }
        let mut pieces = vec![(0.0, format!("{head}\r\n").into_bytes())];
        let mut end = if close { End::Closed } else { End::Kept };
        if !chunked {
            let body = response["body"].as_str().map(str::to_owned);
            let body = body.unwrap_or_else(|| stream.unwrap().iter().map(|(_, line)| format!("{line}\n")).collect());
            if length != Some(body.len()) {
                return Self::Abridged;
            }
            pieces[0].1.extend(body.into_bytes());
            return Self::Sent { pieces, end };
        }
        let chunk = |text: &str| format!("{:x}\r\n{text}\r\n", text.len()).into_bytes();
        let whole = response["body"].as_str().map(|body| vec![(0.0, chunk(body))]);
        let lines = || {
            stream
                .unwrap()
                .into_iter()
                .map(|(at, line)| (at, chunk(&format!("{line}\n"))))
        };
        pieces.extend(whole.unwrap_or_else(|| lines().collect()));
        match response["end"].as_str() {
            Some(text) if text.contains("without a terminating chunk") => end = End::Closed,
            Some(text) if text.starts_with("client") => end = End::Open,
            Some(text) => {
                let (_, after) = text.rsplit_once(" at +").unwrap();
                let seconds = after.trim_end_matches('s').parse().unwrap();
                pieces.push((seconds, b"0\r\n\r\n".to_vec()));
            }
            None => pieces.push((0.0, b"0\r\n\r\n".to_vec())),
        }
        Self::Sent { pieces, end }
    }

    /// The body, if it came in one piece and is JSON.
    pub(super) fn json(&self) -> Option<Value> {
        let Self::Sent { pieces, .. } = self else { return None };
        let text = std::str::from_utf8(&pieces[0].1).ok()?;
        serde_json::from_str(text.split_once("\r\n\r\n")?.1).ok()
    }

    /// The status in the head.
    pub(super) fn status(&self) -> Option<u16> {
        let Self::Sent { pieces, .. } = self else { return None };
        let head = String::from_utf8_lossy(&pieces[0].1);
        head.split(' ').nth(1)?.parse().ok()
    }
}

/// The bytes of a text in which line breaks are spelled out.
fn unescaped(text: &str) -> Vec<u8> {
    text.replace("\\r\\n", "\r\n").replace("\\n", "\n").into_bytes()
}
