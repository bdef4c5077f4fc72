import java.io.ByteArrayInputStream;
import java.net.HttpURLConnection;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.file.Files;
import java.nio.file.Path;

/** What Java's own clients send, each in its own way: java Java.java URL FILE; prints an answer a line. */
public class Java {
    public static void main(String[] arguments) throws Exception {
        URI uri = URI.create(arguments[0] + "/predict?top=1");
        byte[] picture = Files.readAllBytes(Path.of(arguments[1]));
        for (HttpClient.Version version : HttpClient.Version.values()) { // the newer asks to change to HTTP/2
            HttpClient client = HttpClient.newBuilder().version(version).build();
            for (boolean asksFirst : new boolean[] {true, false}) {
                HttpRequest.Builder request = HttpRequest.newBuilder(uri).expectContinue(asksFirst);
                for (var body : new HttpRequest.BodyPublisher[] {
                    BodyPublishers.ofByteArray(picture), // of no type
                    BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(picture)), // in chunks
                }) {
                    System.out.println(client.send(request.POST(body).build(), BodyHandlers.ofString()).body().strip());
                }
            }
        }
        HttpURLConnection connection = (HttpURLConnection) uri.toURL().openConnection(); // calls all a typed form
        connection.setDoOutput(true);
        connection.getOutputStream().write(picture);
        System.out.println(new String(connection.getInputStream().readAllBytes()).strip());
    }
}
