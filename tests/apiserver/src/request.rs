//! What a request asks for: its path and parameters in the API's words. Pure.

use std::collections::BTreeMap;

use crate::resource::Resource;
use crate::selector;

/// What a request does to what it names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// One object.
    Get,
    /// All that are selected.
    List,
    /// A stream of changes.
    Watch,
    /// POST.
    Create,
    /// PUT.
    Update,
    /// PATCH, of any kind.
    Patch,
    /// DELETE of one object.
    Delete,
    /// Anything else.
    Other,
}

impl Verb {
    /// In lower case, as RBAC writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::List => "list",
            Self::Watch => "watch",
            Self::Create => "create",
            Self::Update => "update",
            Self::Patch => "patch",
            Self::Delete => "delete",
            Self::Other => "other",
        }
    }
}

/// Where a request goes.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Route {
    /// An object or all of a kind.
    Objects(Target),
    /// `/version`.
    Version,
    /// `/livez`, `/readyz`, `/healthz`.
    Health,
    /// `/api`, `/apis`, `/api/v1`, `/apis/GROUP/VERSION`: what there is.
    Discovery,
    /// Anywhere else.
    Elsewhere,
}

/// The objects a request is about.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Target {
    pub(crate) verb: Verb,
    pub(crate) group: String,
    pub(crate) version: String,
    pub(crate) plural: String,
    pub(crate) subresource: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) parameters: Parameters,
}

impl Target {
    /// The resource, if the server has it.
    pub(crate) fn resource(&self) -> Option<&'static Resource> {
        Resource::find(&self.group, &self.version, &self.plural)
    }

    /// The name of the object; for lists and watches the one that a field selector asks for.
    pub(crate) fn selected_name(&self) -> &str {
        if matches!(self.verb, Verb::List | Verb::Watch) {
            return selector::selected_name(self.parameters.text("fieldSelector")).unwrap_or(&self.name);
        }
        &self.name
    }
}

/// The query of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Parameters(BTreeMap<String, Vec<String>>);

impl Parameters {
    pub(crate) fn parse(query: &str) -> Self {
        let mut parameters: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            parameters.entry(decoded(key)).or_default().push(decoded(value));
        }
        Self(parameters)
    }

    /// The parameter, if it is there at all; the first, if there are many.
    pub(crate) fn find(&self, name: &str) -> Option<&str> {
        self.all(name).first().map(String::as_str)
    }

    /// All parameters of that name, in their order.
    pub(crate) fn all(&self, name: &str) -> &[String] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    /// The parameter, or nothing.
    pub(crate) fn text(&self, name: &str) -> &str {
        self.find(name).unwrap_or_default()
    }

    pub(crate) fn is_true(&self, name: &str) -> bool {
        matches!(self.text(name), "true" | "1")
    }
}

/// Finds what a request is about.
pub(crate) fn route(method: &str, path: &str, query: &str) -> Route {
    let parameters = Parameters::parse(query);
    let steps: Vec<String> = path.split('/').skip(1).map(decoded).collect();
    let steps: Vec<&str> = steps
        .iter()
        .map(String::as_str)
        .filter(|step| !step.is_empty())
        .collect();
    let (group, version, rest) = match steps.as_slice() {
        ["version"] => return Route::Version,
        ["livez" | "readyz" | "healthz", ..] => return Route::Health,
        ["api" | "apis"] | ["api", "v1"] | ["apis", _] | ["apis", _, _] => return Route::Discovery,
        ["api", "v1", rest @ ..] => ("", "v1", rest),
        ["apis", group, version, rest @ ..] => (*group, *version, rest),
        _ => return Route::Elsewhere,
    };
    let (prefixed, rest) = match rest {
        ["watch", rest @ ..] => (true, rest),
        rest => (false, rest),
    };
    let (namespace, plural, name, subresource) = match rest {
        // A namespace is itself an object, and has the subresources of one.
        ["namespaces"] => ("", "namespaces", "", ""),
        ["namespaces", name] => ("", "namespaces", *name, ""),
        ["namespaces", name, "status" | "finalize"] => ("", "namespaces", *name, rest[2]),
        ["namespaces", namespace, plural] => (*namespace, *plural, "", ""),
        ["namespaces", namespace, plural, name] => (*namespace, *plural, *name, ""),
        ["namespaces", namespace, plural, name, subresource, ..] => (*namespace, *plural, *name, *subresource),
        [plural] => ("", *plural, "", ""),
        [plural, name] => ("", *plural, *name, ""),
        [plural, name, subresource, ..] => ("", *plural, *name, *subresource),
        [] => return Route::Elsewhere,
    };
    let watched = prefixed || parameters.is_true("watch");
    let verb = match (method, name.is_empty()) {
        ("GET" | "HEAD", true) if watched => Verb::Watch,
        ("GET" | "HEAD", true) => Verb::List,
        ("GET" | "HEAD", false) => Verb::Get,
        ("POST", _) => Verb::Create,
        ("PUT", _) => Verb::Update,
        ("PATCH", _) => Verb::Patch,
        ("DELETE", _) => Verb::Delete,
        _ => Verb::Other,
    };
    Route::Objects(Target {
        verb,
        group: group.into(),
        version: version.into(),
        plural: plural.into(),
        subresource: subresource.into(),
        namespace: namespace.into(),
        name: name.into(),
        parameters,
    })
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'+' => bytes.push(b' '),
            b'%' => {
                let digits: Vec<u8> = rest.by_ref().take(2).collect();
                let code = std::str::from_utf8(&digits)
                    .ok()
                    .and_then(|digits| u8::from_str_radix(digits, 16).ok());
                bytes.push(code.unwrap_or(b'%'));
            }
            other => bytes.push(other),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(method: &str, path: &str, query: &str) -> (Verb, String, String, String, String) {
        let Route::Objects(one) = route(method, path, query) else {
            panic!("{path} is no object")
        };
        (one.verb, one.namespace, one.plural, one.name, one.subresource)
    }

    #[test]
    fn paths_are_read_as_the_api_reads_them() {
        let expected = |verb, parts: [&str; 4]| {
            let [namespace, plural, name, subresource] = parts.map(str::to_owned);
            (verb, namespace, plural, name, subresource)
        };

        assert_eq!(
            target("GET", "/api/v1/nodes", "watch=1"),
            expected(Verb::Watch, ["", "nodes", "", ""])
        );
        assert_eq!(
            target("GET", "/api/v1/watch/nodes", ""),
            expected(Verb::Watch, ["", "nodes", "", ""])
        );
        assert_eq!(
            target("GET", "/api/v1/nodes/a", "watch=1"),
            expected(Verb::Get, ["", "nodes", "a", ""])
        );
        assert_eq!(
            target("PATCH", "/api/v1/nodes/a/status", ""),
            expected(Verb::Patch, ["", "nodes", "a", "status"])
        );
        assert_eq!(
            target("GET", "/api/v1/namespaces/m", ""),
            expected(Verb::Get, ["", "namespaces", "m", ""])
        );
        assert_eq!(
            target("POST", "/apis/events.k8s.io/v1/namespaces/m/events", ""),
            expected(Verb::Create, ["m", "events", "", ""])
        );
        assert_eq!(
            (route("GET", "/readyz", ""), route("GET", "/nope", "")),
            (Route::Health, Route::Elsewhere)
        );
    }

    #[test]
    fn parameters_are_decoded() {
        let parameters = Parameters::parse("labelSelector=mesh%3Don&limit=2&continue=a%2Bb&watch=");

        assert_eq!(
            (parameters.text("labelSelector"), parameters.text("continue")),
            ("mesh=on", "a+b")
        );
        assert_eq!((parameters.find("watch"), parameters.find("none")), (Some(""), None));
    }

    #[test]
    fn a_parameter_may_come_often() {
        let parameters = Parameters::parse("command=ls&stdout=true&command=-l");

        assert_eq!(parameters.all("command"), ["ls", "-l"]);
        assert_eq!((parameters.text("command"), parameters.all("none").len()), ("ls", 0));
    }
}
