// A client of pagewire.v1 in Go: each part shows one habit of a gRPC client, and checks what it sees.
//
//	go run . -address 127.0.0.1:50051 -prompt "Once upon a time"
//
// Exit codes: 0 everything was as it must be, 1 something was not, 2 wrong usage.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	pb "pagewire.dev/gen/pagewire/v1"
)

// A part that has not ended after this long has failed.
const partLimit = 20 * time.Minute // what a slow machine takes for an overload is far more than usual

// What a part returns that did not run.
var errSkipped = errors.New("skipped")

type client struct {
	inference pb.InferenceServiceClient
	prompt    string
	overload  int
}

// Each part returns one line about what it saw.
var parts = []struct {
	name string
	run  func(*client, context.Context) (string, error)
}{
	{"stream", (*client).stream},
	{"cancel", (*client).cancel},
	{"cancel-by-id", (*client).cancelByID},
	{"deadline", (*client).deadline},
	{"bad-request", (*client).badRequest},
	{"same-id", (*client).sameID},
	{"overload", (*client).overloaded},
}

func main() {
	address := flag.String("address", "127.0.0.1:50051", "of the server")
	prompt := flag.String("prompt", "The capital of France is", "what the model continues")
	overload := flag.Int("overload", 0, "streams to offer at once, more than the server runs and queues; 0: none")
	flag.Parse()
	if flag.NArg() > 0 || *overload < 0 || *prompt == "" {
		fmt.Fprintln(os.Stderr, "only flags are taken, -prompt may not be empty, -overload not be negative; see -help")
		os.Exit(2)
	}
	connection, err := connect(*address)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	defer connection.Close()
	c := &client{pb.NewInferenceServiceClient(connection), *prompt, *overload}
	if failed := c.runAll(); failed > 0 {
		os.Exit(1) // the process ends here, and the connection with it
	}
}

// Connects with the first call. A ping tells a dead host from a silent one; the server allows one every 10 s.
func connect(address string) (*grpc.ClientConn, error) {
	return grpc.NewClient(
		address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
	)
}

// Prints a line for each part and a summary; returns how many failed.
func (c *client) runAll() int {
	passed, skipped, failed := 0, 0, 0
	for _, part := range parts {
		ctx, stop := context.WithTimeout(context.Background(), partLimit)
		line, err := part.run(c, ctx)
		stop()
		verdict := "ok"
		switch {
		case errors.Is(err, errSkipped):
			verdict = "skipped"
			skipped++
		case err != nil:
			verdict, line = "FAILED", refusalOf(err).String()
			failed++
		default:
			passed++
		}
		fmt.Printf("%-12s %-7s  %s\n", part.name, verdict, line)
	}
	fmt.Printf("%d ok, %d skipped, %d failed\n", passed, skipped, failed)
	return failed
}
